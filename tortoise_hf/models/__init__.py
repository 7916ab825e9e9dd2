"""The networks: DVAE (mel to codes, frozen) and GPT (text and conditioning to codes, the one that is trained)."""
