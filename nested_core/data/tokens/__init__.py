"""Tokenized examples: computed as mlx-lm does, on all cores, and kept in memory-mapped files.

example_encoding tokenizes one example and finds its target spans; parallel_tokenization does all
splits. shown_texts checks that a row's texts are in what the chat template renders, and
control_tokens looks for control tokens in them. tokenized_split is the result in memory and on
disk, and as displayed to a person. template_time_limit limits the time of a chat template, and
tokenizer_source names a tokenizer for another process.
"""
