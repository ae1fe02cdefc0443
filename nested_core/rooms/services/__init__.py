"""The services of `report_to`: what a run reports, sent to each by its own client."""
