"""Every command. A body calls the package; only the commands that need torch, Ray and Flower import them."""
