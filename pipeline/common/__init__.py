"""What all rooms share: the folders and the frame of a stage, logs, parallel work, peak memory."""
