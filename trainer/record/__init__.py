"""What a run leaves to be seen: metrics, console, report page, trackers, profiles."""
