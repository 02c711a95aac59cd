"""What knows about process groups: the groups themselves, the sharded vocabulary, agreement between ranks."""
