"""A Llama-family model: its description, weights, tokenizer, paged KV cache, decode step and generation."""
