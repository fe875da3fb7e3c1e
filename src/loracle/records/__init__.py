"""What a run or study leaves on disk; the only room that knows file names. No torch."""
