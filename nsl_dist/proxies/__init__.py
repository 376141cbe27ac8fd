"""The class-proxy matrix, partitioned across workers: sampling, loss and exact sparse updates."""
