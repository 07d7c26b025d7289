"""The page. It looks at the workspace and asks jobs to act; it never trains or samples."""
