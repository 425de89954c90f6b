"""Metal kernel sources, installed as `bitnet_mlx.metal_kernels`.

Header templates (.h) hold the logic and are valid Metal; thin bodies (.metal) say where each kernel reads and writes.
Nothing is compiled when the package is built: MLX compiles a body on the machine that runs it, when it is first used.
Read one with `importlib.resources.files("bitnet_mlx.metal_kernels").joinpath(name).read_text()`.
"""
