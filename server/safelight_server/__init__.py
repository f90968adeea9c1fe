"""Safelight: text-to-image diffusion over gRPC, with a preview from the first denoising step on."""
