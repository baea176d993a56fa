#!/bin/sh
# The team's rules that no linter has. Each says why.
set -u
bad=0

# rule WHY PATTERN FILES...: no line of the files may match.
rule() {
	why=$1 pattern=$2
	shift 2
	git grep -n -I -E "$pattern" -- "$@"
	case $? in
	0) echo "^ $why" >&2 && bad=1 ;;
	1) ;; # no match
	*) echo "git grep has failed, so nobody knows: $why" >&2 && bad=1 ;;
	esac
}

library="*.go :!*_test.go :!examples :!bench :!internal"
linked="internal/wire/*.go internal/errtext/*.go internal/table/*.go internal/amqpurl/*.go :!*_test.go" # what of internal is part of the library

for files in "$library" "$linked"; do
	# shellcheck disable=SC2086
	rule "a library logs through slog, it does not print" 'fmt\.Print' $files
	# shellcheck disable=SC2086
	rule "a library takes its context from its caller" 'context\.(Background|TODO)\(' $files
	# shellcheck disable=SC2086
	rule "wait on a timer in a select, so that a stop ends the wait" 'time\.Sleep\(' $files
done
for files in '*.go :!*_test.go :!internal' "$linked"; do
	set -f # the patterns are git's, which looks into all folders
	# shellcheck disable=SC2086
	rule "the runtime dependencies are the driver and nothing else" '"(github\.com/stretchr|github\.com/testcontainers|go\.uber\.org)' $files
	set +f
done
rule "the kit must not import the root: the root's tests import the kit" '"github\.com/steadymq/steadymq"' 'steadymqtest/*.go' ':!*_test.go'

# A sleep in a test is virtual time inside a synctest bubble, or a test that hopes. What meets a real
# broker or a real network lives in real time, in these folders. The others have bubbles, or tests of
# the behaviour, which are in the bubble of their rig (rig.Bubble).
realtime='^internal/(faultproxy|matrix|rabbit|router)/'
for file in $(git grep -l 'time\.Sleep(' -- '*_test.go' | grep -vE "$realtime"); do
	git grep -qE '(synctest\.Test|rig\.Bubble)\(' -- ":(glob)$(dirname "$file")/*_test.go" ||
		{ echo "$file: time.Sleep outside a synctest bubble" >&2; bad=1; }
done
for file in $(git grep -l 'time\.Sleep(' -- internal/rig); do
	grep -q 'synctest\.Test(' "$file" || { echo "$file: only what makes the bubble may sleep" >&2; bad=1; }
done
exit $bad
