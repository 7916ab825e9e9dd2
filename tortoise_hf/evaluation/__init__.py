"""How well a voice speaks: understood by a recogniser, like its speaker, ending by itself, without repeating itself."""
