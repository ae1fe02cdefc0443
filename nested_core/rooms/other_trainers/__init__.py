"""Keys of other trainers, each answered with ours."""
