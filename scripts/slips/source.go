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
	"strings"
)

// source is a file of the library that is built on this system, tests apart.
type source struct {
	pkg  *pkg
	path string // as the file system has it
	name string // relative to the root, with slashes
	text string
	tree *ast.File
}

// pkg is a package whose names are resolved.
type pkg struct {
	path  string
	fset  *token.FileSet
	types *types.Package
	info  *types.Info
	files []*source
	// imports gives the types of what the package imports.
	imports types.Importer
}

// load asks `go list`, which compiles what it has not compiled yet.
func load(root string, patterns ...string) ([]*pkg, error) {
	type listed struct {
		ImportPath, Dir, Export string
		GoFiles                 []string
		DepOnly                 bool
	}
	cmd := exec.Command("go", append([]string{"list", "-export", "-deps", "-json=ImportPath,Dir,Export,GoFiles,DepOnly"}, patterns...)...)
	cmd.Dir, cmd.Stderr = root, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	exports := make(map[string]string)
	var own []*listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		l := new(listed)
		if err := d.Decode(l); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		exports[l.ImportPath] = l.Export
		if !l.DepOnly {
			own = append(own, l)
		}
	}
	lookup := func(path string) (io.ReadCloser, error) {
		if exports[path] == "" {
			return nil, fmt.Errorf("no types of %s", path)
		}
		return os.Open(exports[path])
	}
	var packages []*pkg
	for _, l := range own {
		fset := token.NewFileSet()
		p := &pkg{path: l.ImportPath, fset: fset, imports: importer.ForCompiler(fset, "gc", lookup)}
		for _, name := range l.GoFiles {
			if err := p.read(root, filepath.Join(l.Dir, name)); err != nil {
				return nil, err
			}
		}
		if err := p.check(); err != nil {
			return nil, err
		}
		packages = append(packages, p)
	}
	return packages, nil
}

func (p *pkg) read(root, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	name, err := filepath.Rel(root, path)
	if err != nil {
		return err
	}
	tree, err := parser.ParseFile(p.fset, path, text, parser.SkipObjectResolution)
	p.files = append(p.files, &source{pkg: p, path: path, name: filepath.ToSlash(name), text: string(text), tree: tree})
	return err
}

func (p *pkg) check() (err error) {
	p.info = &types.Info{
		Types:      make(map[ast.Expr]types.TypeAndValue),
		Defs:       make(map[*ast.Ident]types.Object),
		Uses:       make(map[*ast.Ident]types.Object),
		Selections: make(map[*ast.SelectorExpr]*types.Selection),
	}
	conf := types.Config{Importer: p.imports}
	p.types, err = conf.Check(p.path, p.fset, p.trees(), p.info)
	return err
}

func (p *pkg) trees() (trees []*ast.File) {
	for _, f := range p.files {
		trees = append(trees, f.tree)
	}
	return trees
}

// compiles says whether the package does with this text in place of the file's.
func (s *source) compiles(text string) bool {
	changed, err := parser.ParseFile(s.pkg.fset, s.path, text, parser.SkipObjectResolution)
	if err != nil {
		return false
	}
	trees := s.pkg.trees()
	for i, f := range s.pkg.files {
		if f == s {
			trees[i] = changed
		}
	}
	conf := types.Config{Importer: s.pkg.imports, Error: func(error) {}} // unused imports are named after all else
	_, err = conf.Check(s.pkg.path, s.pkg.fset, trees, nil)
	return err == nil
}

func (s *source) offset(pos token.Pos) int { return s.pkg.fset.Position(pos).Offset }

func (s *source) lineOf(offset int) int { return 1 + strings.Count(s.text[:offset], "\n") }

// slip is a small change of one file: other text from start to end.
type slip struct {
	file       *source
	kind       kind
	function   string
	start, end int
	text       string
	line       int
	nth        int // of those in the function that read the same, 1 for the first
}

func (s *slip) changed() string { return s.file.text[:s.start] + s.text + s.file.text[s.end:] }

func (s *slip) place() string { return fmt.Sprintf("%s:%d", s.file.name, s.line) }

// listed is the slip's line in the list.
func (s *slip) listed() string { return fmt.Sprintf("%s [%s] %s", s.place(), s.kind, s) }

// change shows the lines before and after, as one line each.
func (s *slip) change() string {
	from := 1 + strings.LastIndexByte(s.file.text[:s.start], '\n')
	to := len(s.file.text)
	if i := strings.IndexByte(s.file.text[s.end:], '\n'); i >= 0 {
		to = s.end + i
	}
	before := s.file.text[from:to]
	after := s.file.text[from:s.start] + s.text + s.file.text[s.end:to]
	return short(before) + " -> " + short(after)
}

// String names the slip, as equivalent.txt does: no line number, which would change too often.
func (s *slip) String() string {
	text := fmt.Sprintf("%s: %s: %s", s.file.name, s.function, s.change())
	if s.nth > 1 {
		text += fmt.Sprintf(" (number %d)", s.nth)
	}
	return text
}

// short makes one line of the text, without its middle if it is long, and without its comments.
func short(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if i := strings.Index(line, "// "); i >= 0 {
			line = line[:i]
		}
		lines = append(lines, strings.Fields(line)...)
	}
	one := strings.Join(lines, " ")
	const most = 160
	if runes := []rune(one); len(runes) > most {
		return string(runes[:most/2]) + " ... " + string(runes[len(runes)-most/2:])
	}
	if one == "" {
		return "(nothing)"
	}
	return one
}
