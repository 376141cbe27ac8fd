"""The class-proxy matrix, partitioned over the workers: sampling, loss and exact sparse updates."""
