"""Reports: reads records, draws PNG, HTML and Markdown. Runs on any machine; never imports torch."""
