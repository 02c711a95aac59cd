"""Process groups, the sharded vocabulary, context parallelism, and agreement between ranks."""
