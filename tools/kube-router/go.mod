module safelight/tools/kube-router

go 1.26.0
