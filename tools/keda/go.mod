// Names KEDA's version for `make test-kubernetes`, which builds it with KEDA's own go.mod.
module safelight/tools/keda

go 1.24.0

require github.com/kedacore/keda/v2 v2.21.0
