package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// listed is what `go list` tells of a package.
type listed struct {
	ImportPath     string
	Dir            string
	Export         string // the file with the types that it exports
	GoFiles        []string
	IgnoredGoFiles []string // those of other systems, and other tests' too
	Imports        []string
	DepOnly        bool
}

// otherFiles are the files that are not built on this system, tests apart.
func (p *listed) otherFiles() []string {
	return slices.DeleteFunc(slices.Clone(p.IgnoredGoFiles), func(name string) bool {
		return strings.HasSuffix(name, "_test.go")
	})
}

// loaded are packages, and what they import.
type loaded struct {
	fset     *token.FileSet
	packages []*listed // in the order of `go list`: what is imported comes first
	byPath   map[string]*listed
}

// load asks `go list`, which compiles what it has not compiled yet.
func load(dir string, patterns ...string) (*loaded, error) {
	const fields = "ImportPath,Dir,Export,GoFiles,IgnoredGoFiles,Imports,DepOnly"
	cmd := exec.Command("go", append([]string{"list", "-export", "-deps", "-json=" + fields}, patterns...)...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	l := &loaded{fset: token.NewFileSet(), byPath: make(map[string]*listed)}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		p := new(listed)
		if err := d.Decode(p); errors.Is(err, io.EOF) {
			return l, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		l.packages = append(l.packages, p)
		l.byPath[p.ImportPath] = p
	}
}

// typed is a package whose names are resolved.
type typed struct {
	*listed
	fset  *token.FileSet
	pkg   *types.Package
	info  *types.Info
	files []*ast.File
}

// check resolves the names of a package's files. Those of other systems declare some things a
// second time and may import what is not there; what else they use is found all the same.
func (l *loaded) check(path string) (*typed, error) {
	p := l.byPath[path]
	if p == nil {
		return nil, fmt.Errorf("no package %s", path)
	}
	files, err := l.parse(p, p.GoFiles)
	if err != nil {
		return nil, err
	}
	others, err := l.parse(p, p.otherFiles())
	if err != nil {
		return nil, err
	}
	t := &typed{listed: p, fset: l.fset, info: newInfo(), files: files}
	conf := types.Config{Importer: importer.ForCompiler(l.fset, "gc", l.export)}
	if t.pkg, err = conf.Check(path, l.fset, files, t.info); err != nil || len(others) == 0 {
		return t, err
	}
	t.info, t.files = newInfo(), append(files, others...)
	conf.Error = func(error) {}
	t.pkg, _ = conf.Check(path, l.fset, t.files, t.info)
	return t, nil
}

func newInfo() *types.Info {
	return &types.Info{
		Defs:       make(map[*ast.Ident]types.Object),
		Uses:       make(map[*ast.Ident]types.Object),
		Selections: make(map[*ast.SelectorExpr]*types.Selection),
	}
}

func (l *loaded) parse(p *listed, names []string) (files []*ast.File, err error) {
	for _, name := range names {
		f, err := parser.ParseFile(l.fset, filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

func (l *loaded) export(path string) (io.ReadCloser, error) {
	p := l.byPath[path]
	if p == nil || p.Export == "" {
		return nil, fmt.Errorf("no types of %s", path)
	}
	return os.Open(p.Export)
}
