"""The rules that judge a data set, as tables of pandera checks, and the report on what they find.

line_rules, file_rules and token_rules are the tables; rule_table runs one over a frame and turns
failing rows into findings. repeated_lines and near_duplicates relate lines before they are judged,
dropped_lines applies data_policy, split_statistics counts; dataset_report holds the result, without
polars.
"""
