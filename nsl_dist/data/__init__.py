"""Images on their way to the model: readers, shards, the class-balanced plan and its streaming."""
