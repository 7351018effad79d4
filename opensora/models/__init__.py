"""Networks: STDiT, the VAE and the text encoder. Single-device code; parallelism is applied from outside."""
