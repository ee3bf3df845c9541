"""Code that all of the pipeline's packages share: folders, the frame of a stage, logs, parallel work, peak memory."""
