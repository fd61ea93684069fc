def report(run): return "<html>"
