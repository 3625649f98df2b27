"""`lab serve`: a model behind HTTP, as OpenAI's interface has it."""
