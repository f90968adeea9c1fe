"""Never develop the same picture twice. Pure parts first, in the order in which a request meets them.

fingerprint   what makes two outputs the same, or similar enough to compare; keys that tell nothing without a secret
embedding     a prompt's hidden states to one centred vector
lsh           vectors at high cosine: random hyperplanes, buckets in any store of sets
guard         whether two texts may share a picture at all
neighbours    vectors at lower cosine: sign bits, scanned and ranked again
bands         how many steps a neighbour at some cosine saves
eviction      what goes when bytes are short
"""
