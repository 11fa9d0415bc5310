# bitsandbytes and transformers look for the Hub's package `kernels`; started from the repository root they find this folder. It must
# import cleanly and offer neither a version nor `get_kernel`: both then take it for absent. Ours is `bitmend.kernels`.
