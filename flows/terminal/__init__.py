"""What a person sees in a terminal: progress, tables, a run while it goes on, and its results.

console.py prints, run_follower.py follows a run, run_results.py is what it came to, and
token_view.py shows tokenised examples.
"""
