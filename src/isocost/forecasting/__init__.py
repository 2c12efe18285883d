"""What a whole study would take on devices that are not at hand: arithmetic on its file, no picture and no weight read."""
