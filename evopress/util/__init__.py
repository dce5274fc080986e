"""What every other package may use: errors, progress, devices, retries."""
