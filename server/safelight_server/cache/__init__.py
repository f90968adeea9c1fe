"""The generation cache: exact pictures, similar pictures, latents to start from, and prompt embeddings.

cache         looks up and stores everything for an output; the rest of the server calls this module
admin         statistics and purges, for operators
purges        deletes in all tiers and indexes, here and at other replicas
namespaces    who shares what: one namespace for a tenant or a pool, and the names of an output in it
fingerprint   what makes two outputs identical or comparable; index keys as HMACs
pictures      finished pictures and their encodings
prompts       embeddings of prompts
checkpoints   latents after some steps of an output
approximate   lookups by the similarity of prompts
"""
