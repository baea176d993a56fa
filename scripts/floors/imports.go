package main

import (
	"fmt"
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// patterns are paths below the module, "." for its root; "/..." at the end of one takes in all that
// is below, "!" before one takes it out again.
type patterns []string

func (p patterns) match(root, path string) bool {
	matched := false
	for _, pattern := range p {
		pattern, out := strings.CutPrefix(pattern, "!")
		if matchesOne(root, pattern, path) {
			matched = !out
		}
	}
	return matched
}

func matchesOne(root, pattern, importPath string) bool {
	pattern, tree := strings.CutSuffix(pattern, "/...")
	full := path.Join(root, pattern)
	return importPath == full || tree && strings.HasPrefix(importPath, full+"/")
}

// below is how a package is called inside its module.
func below(root, importPath string) string {
	if rest, ok := strings.CutPrefix(importPath, root+"/"); ok {
		return rest
	}
	return importPath
}

// imports tells of each import that a rule forbids.
func (l *loaded) imports(root string, rules []rule) (wrong []string, err error) {
	for _, p := range l.packages {
		if p.DepOnly {
			continue
		}
		imported, err := p.allImports()
		if err != nil {
			return nil, err
		}
		for _, r := range rules {
			if !r.packages.match(root, p.ImportPath) {
				continue
			}
			for _, i := range imported {
				if r.not.match(root, i) {
					wrong = append(wrong, fmt.Sprintf("package %s imports %s: %s", below(root, p.ImportPath), below(root, i), r.why))
				}
			}
		}
	}
	return wrong, nil
}

// allImports are those of the files of other systems, too.
func (p *listed) allImports() ([]string, error) {
	all := slices.Clone(p.Imports)
	for _, name := range p.otherFiles() {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.ImportsOnly)
		if err != nil {
			return nil, err
		}
		for _, i := range f.Imports {
			imported, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return nil, err
			}
			all = append(all, imported)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// idle tells of each pattern of a rule that no package matches: after a package has moved, its rule
// would hold nobody to anything.
func (l *loaded) idle(root string, rules []rule) (idle []string) {
	for _, r := range rules {
		for _, pattern := range slices.Concat(r.packages, r.not) {
			if !slices.ContainsFunc(l.packages, func(p *listed) bool {
				return !p.DepOnly && matchesOne(root, strings.TrimPrefix(pattern, "!"), p.ImportPath)
			}) {
				idle = append(idle, fmt.Sprintf("rule %q: no package matches %s", r.why, pattern))
			}
		}
	}
	return idle
}
