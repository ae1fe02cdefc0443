"""What the room `nights` does around the flows of a fine-tune and of every hour.

watcher.py has it in its order and publishes the pages, champion_page.py publishes the champion's.
warning_events.py warns before a night fails, and run_list.py ends runs without a process and keeps
Prefect's list short.
"""
