"""Text to token ids and back: what a model's files say of it, used in a process of its own."""
