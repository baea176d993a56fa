package rig

import (
	"bytes"
	"strings"
	"sync"
)

// LogBuffer keeps what was logged. It may be written and read at the same time.
type LogBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write is for a slog.Handler.
func (l *LogBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String returns all of the log.
func (l *LogBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Lines returns what was logged at INFO and above and holds all of the texts.
func (l *LogBuffer) Lines(texts ...string) (found []string) {
next:
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, "level=DEBUG") {
			continue
		}
		for _, text := range texts {
			if !strings.Contains(line, text) {
				continue next
			}
		}
		found = append(found, line)
	}
	return found
}

// Last returns the last line with all of the texts, "" if there is none.
func (l *LogBuffer) Last(texts ...string) string {
	found := l.Lines(texts...)
	if len(found) == 0 {
		return ""
	}
	return found[len(found)-1]
}

// Warnings are the lines of the log that hold text and warn.
func (r *Rig) Warnings(text string) (lines []string) {
	for line := range strings.Lines(r.Log.String()) {
		if strings.Contains(line, "WARN") && strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}

// TimesLogged returns how often text is in the log.
func (r *Rig) TimesLogged(text string) int {
	return strings.Count(r.Log.String(), text)
}
