"""ART on a GPU: its own backend with Unsloth and vLLM, and what this project adds to it."""
