# Two commands to know: `make demo` and `make test`. Both do all set-up themselves.

SEEDS    ?= 10000
SLIPS    ?= 150
SEED     ?= 1
DURATION ?= 30m
GO       ?= go

# The versions of the tools are fixed, so that a new release breaks nobody's build.
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.7.0
GOFUMPT     = mvdan.cc/gofumpt@v0.9.2
GOLANGCI    = github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
BENCHSTAT   = golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.PHONY: demo
demo: ## watch a consumer heal, on a broker inside the process or on AMQP_URL's
	$(GO) run ./examples/demo

.PHONY: test
test: driver-tests ## every test with -race, those on a real RabbitMQ included and required
	$(GO) test -run '^TestSim$$' -timeout 10m ./internal/sim -seeds 500
	STEADYMQ_REQUIRE_BROKER=1 $(GO) test -race -p 1 -timeout 25m ./... # one package at a time: each starts brokers

.PHONY: driver-tests
driver-tests: ## the driver's own integration tests, against the kit
	$(GO) run ./scripts/drivertests

.PHONY: quick
quick: ## what runs without a broker, within a minute
	$(GO) test ./...

.PHONY: sim
sim: ## the simulation over many seeds: make sim SEEDS=10000
	$(GO) test -run '^TestSim$$' -timeout 4h -v ./internal/sim -stuck 5m -seeds $(SEEDS)

.PHONY: mutants
mutants: ## plant bugs one by one; the simulation must catch them
	$(GO) test -run '^TestMutants$$' -timeout 0 -v ./internal/sim -mutants

.PHONY: slips
slips: ## plant slips made from the source; the quick tests and 300 seeds must catch 90 % of them
	$(GO) run ./scripts/slips -n $(SLIPS) -seed $(SEED)

.PHONY: bench
bench: ## throughput, CPU and recovery against the plain driver, into bench/RESULTS.md
	$(GO) run ./bench -write

# The ratios within one run are the judge: consumer=steadymq against consumer=driver, on the same machine and side by side.
# The base only shows drift, and only on the machine that recorded it; CI runs base and head alternately (scripts/benchdiff).
DISPATCH = $(GO) test -run '^$$' -bench '^BenchmarkDispatch$$' -benchtime $(TIMES) -count $(COUNT) ./bench
TIMES   ?= 800000x
COUNT   ?= 6

.PHONY: bench-base
bench-base: ## record bench/base.txt, on a machine that does nothing else
	$(DISPATCH) >bench/base.out
	mv bench/base.out bench/base.txt

.PHONY: bench-diff
bench-diff: ## run the same and compare it with bench/base.txt
	@test -f bench/base.txt || { echo "there is no bench/base.txt yet: make bench-base"; exit 1; }
	$(DISPATCH) >bench/head.out
	$(GO) run $(BENCHSTAT) -col /consumer bench/head.out # the ratios
	$(GO) run $(BENCHSTAT) bench/base.txt bench/head.out # the drift

.PHONY: matrix
matrix: ## every fault on every broker generation and a cluster
	STEADYMQ_REQUIRE_BROKER=1 STEADYMQ_MATRIX=full $(GO) test -run '^TestMatrix' -timeout 0 -v ./internal/matrix

.PHONY: router
router: ## faults of a real router (root on Linux), into docs/ROUTER.md
	STEADYMQ_REQUIRE_BROKER=1 $(GO) test -count 1 -run '^TestThroughARouter$$' -v ./internal/router -write

.PHONY: soak
soak: ## random faults on a cluster: make soak DURATION=30m
	STEADYMQ_REQUIRE_BROKER=1 $(GO) test -run '^TestSoak$$' -timeout 0 -v ./internal/matrix -soak $(DURATION)

.PHONY: lint
lint: ## vet, staticcheck, gofumpt, golangci-lint and the team's rules
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	@files=$$($(GO) run $(GOFUMPT) -l .) || exit 1; if [ -n "$$files" ]; then echo "gofumpt would change:"; echo "$$files"; exit 1; fi
	$(GO) mod tidy -diff
	$(GO) run $(GOLANGCI) run ./... # .golangci.yml; it is built once, which takes minutes
	sh scripts/rules.sh
	$(GO) run ./scripts/floors
