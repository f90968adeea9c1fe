"""Pictures and latents of similar prompts, found by the cosine of their embeddings.

similar       pictures of similar prompts, checked by the guard
guard         whether two texts may share a picture at all
embedding     a prompt's hidden states to one centred vector
vectors       these vectors as kept entries, from which an index is rebuilt
index         vectors at lower cosine: sign bits, scanned and ranked again
lsh           vectors at high cosine: random hyperplanes, buckets in any store of sets
buckets       the buckets of `lsh` in Redis, which all replicas see
warm_starts   latents of similar prompts to start from
skip_policy   how many steps a cosine saves
eviction      what goes when bytes are short
"""
