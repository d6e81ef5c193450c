"""One sentence encoder, fine-tuned on several classification tasks: `python -m studies.encoder`."""
