"""The rules that judge a data set, as tables of pandera checks.

line_rules, file_rules and token_rules are the tables; rule_table runs one over a frame and turns
failing rows into findings. related_lines relates lines to each other before they are judged, and
applies data_policy; split_statistics counts. What they find is records/dataset.py.
"""
