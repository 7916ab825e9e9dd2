"""Give TorToiSe-TTS a new voice: fine-tune its autoregressive GPT on recordings and transcripts."""
