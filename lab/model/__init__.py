"""A Llama-family decoder: config, weights, tokenizer, paged KV cache, the decode step and generation."""
