"""Never compute the same picture twice: exact, similar, and latents to start from.

cache         looks up and keeps everything for an output; what the rest of the server calls
admin         statistics and purges, for operators
purges        deletes in all tiers and indexes, and tells other replicas
namespaces    who shares what: one namespace for a tenant or a pool, and the names of an output in it
fingerprint   what makes two outputs the same, or similar enough to compare; keys that tell nothing without a secret
pictures      finished pictures and their encodings
prompts       embeddings of prompts
checkpoints   latents after some steps of an output
approximate   what is found by the nearness of prompts
"""
