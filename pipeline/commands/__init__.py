"""What people and schedules start, one file a command: options and their meaning. What a command does is imported when
it is called."""
