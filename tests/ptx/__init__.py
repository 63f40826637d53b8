"""An emulator of PTX, which executes the GPU's own code of kernels on the CPU."""
