"""Pictures and latents of similar prompts: vectors, indexes, the text guard, eviction."""
