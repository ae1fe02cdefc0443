"""Tokenized examples: computed as mlx-lm does, on all cores, and kept in memory-mapped files.

example_encoding tokenizes the examples of a range of lines and finds their target spans;
parallel_tokenization does all splits. text_notes checks that a row's texts are in what the chat
template renders, and looks for control tokens in them. tokenized_split is the result in memory and
on disk, and as displayed to a person. tokenizer_source names a tokenizer for another process.
"""
