# bitsandbytes and transformers try `import kernels` for the Hub's package of that name; from the repository root that finds
# this folder. Ours is `bitmend.kernels`: under the bare name it must look as if it were not installed.
if __name__ == "kernels":
    raise ModuleNotFoundError("No module named 'kernels'", name="kernels")
