"""Similarity search: pictures and latents of similar prompts, by the cosine of prompt vectors.

similar       finds pictures of similar prompts, checked by the guard
guard         decides whether two texts may share a picture
embedding     turns a prompt's hidden states into one centred vector
vectors       stores prompt vectors, from which an index is rebuilt
index         nearest neighbours at lower cosine: a scan of sign bits, ranked by exact cosine
lsh           nearest neighbours at high cosine: locality-sensitive hashing by random hyperplanes
buckets       the buckets of `lsh` in Redis, shared by all replicas
warm_starts   finds latents of similar prompts to start from
skip_policy   decides how many steps to skip at a cosine
eviction      decides which entries to evict: LRU or least benefit
"""
