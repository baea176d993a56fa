package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// house is a package whose files stand in rooms.
type house struct {
	rooms   []room
	floor   map[string]int // of a file; those that are on no floor come last, each by itself
	arrows  []*arrow       // from a file to another of another room
	strays  []string       // methods that stand in another room than their type
	absent  []string       // files of the list that there are not
	unknown []string       // files that the list has not
	twice   []string       // files that it has twice
}

// arrow is what one file uses of another.
type arrow struct {
	from, to string
	uses     []use // each thing once, where it is used first
	count    int   // how often any of them is
}

type use struct {
	name string
	at   token.Position
}

// survey looks who uses whom in a package.
func (l *loaded) survey(path string, rooms []room) (*house, error) {
	t, err := l.check(path)
	if err != nil {
		return nil, err
	}
	h := &house{rooms: slices.Clone(rooms), floor: make(map[string]int)}
	h.furnish(t)
	h.follow(t)
	h.stray(t)
	return h, nil
}

// furnish sets each file on its floor.
func (h *house) furnish(t *typed) {
	there := make(map[string]bool)
	for _, name := range append(slices.Clone(t.GoFiles), t.otherFiles()...) {
		there[name] = true
	}
	for i, r := range h.rooms {
		for _, name := range r {
			if _, twice := h.floor[name]; twice {
				h.twice = append(h.twice, name)
			}
			h.floor[name] = i
			if !there[name] {
				h.absent = append(h.absent, name)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(there)) {
		if _, ok := h.floor[name]; !ok {
			h.unknown = append(h.unknown, name)
			h.floor[name] = len(h.rooms)
			h.rooms = append(h.rooms, room{name})
		}
	}
}

// follow finds the arrows.
func (h *house) follow(t *typed) {
	names := t.names()
	arrows := make(map[[2]string]*arrow)
	seen := make(map[*arrow]map[string]bool)
	add := func(at token.Pos, o types.Object) {
		if o == nil || o.Pkg() != t.pkg || !o.Pos().IsValid() {
			return
		}
		from, to := t.file(at), t.file(o.Pos())
		if h.floor[from] == h.floor[to] {
			return
		}
		a := arrows[[2]string{from, to}]
		if a == nil {
			a = &arrow{from: from, to: to}
			arrows[[2]string{from, to}], seen[a] = a, make(map[string]bool)
		}
		a.count++
		name := names[o.Pos()]
		if name == "" {
			name = o.Name()
		}
		if !seen[a][name] {
			seen[a][name] = true
			a.uses = append(a.uses, use{name, t.fset.Position(at)})
		}
	}
	for _, f := range t.files {
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.Ident:
				add(n.Pos(), t.info.Uses[n])
			case *ast.SelectorExpr:
				for _, field := range embedded(t.info.Selections[n]) {
					add(n.Sel.Pos(), field)
				}
			}
			return true
		})
	}
	h.arrows = slices.SortedFunc(maps.Values(arrows), func(a, b *arrow) int {
		return cmp.Or(cmp.Compare(h.floor[a.from], h.floor[b.from]), cmp.Compare(h.floor[a.to], h.floor[b.to]),
			cmp.Compare(a.from, b.from), cmp.Compare(a.to, b.to))
	})
}

// embedded are the fields that a selection goes through without naming them.
func embedded(s *types.Selection) (through []*types.Var) {
	if s == nil {
		return nil
	}
	at := s.Recv()
	for _, i := range s.Index()[:len(s.Index())-1] {
		if p, ok := types.Unalias(at).Underlying().(*types.Pointer); ok {
			at = p.Elem()
		}
		of, ok := at.Underlying().(*types.Struct)
		if !ok {
			return through
		}
		through = append(through, of.Field(i))
		at = of.Field(i).Type()
	}
	return through
}

// stray finds the methods that stand away from their types.
func (h *house) stray(t *typed) {
	for _, f := range t.files {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv == nil {
				continue
			}
			name := receiver(fn)
			of := t.pkg.Scope().Lookup(name)
			if of == nil {
				continue
			}
			here, home := t.file(fn.Pos()), t.file(of.Pos())
			if h.floor[here] != h.floor[home] {
				h.strays = append(h.strays, fmt.Sprintf("%s: method %s of type %s, which stands in %s", here, fn.Name.Name, name, home))
			}
		}
	}
}

// receiver is the name of the type that a method belongs to.
func receiver(fn *ast.FuncDecl) string {
	for e := fn.Recv.List[0].Type; ; {
		switch x := e.(type) {
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.IndexListExpr:
			e = x.X
		case *ast.Ident:
			return x.Name
		default:
			return ""
		}
	}
}

// file is the name of the file in which something stands.
func (t *typed) file(at token.Pos) string { return filepath.Base(t.fset.Position(at).Filename) }

// names says of methods and fields what they are part of.
func (t *typed) names() map[token.Pos]string {
	names := make(map[token.Pos]string)
	for _, f := range t.files {
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv != nil {
					names[d.Name.Pos()] = receiver(d) + "." + d.Name.Name
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					if s, ok := s.(*ast.TypeSpec); ok {
						t.members(names, s)
					}
				}
			}
		}
	}
	return names
}

func (t *typed) members(names map[token.Pos]string, s *ast.TypeSpec) {
	ast.Inspect(s.Type, func(n ast.Node) bool {
		if f, ok := n.(*ast.Field); ok {
			for _, name := range f.Names {
				names[name.Pos()] = s.Name.Name + "." + name.Name
			}
		}
		return true
	})
}

// report prints what breaks the order, and tells whether anything does.
func (h *house) report(w io.Writer) (broken bool) {
	up := h.up()
	for _, a := range up {
		fmt.Fprintln(w, "up:", a)
	}
	for _, s := range h.strays {
		fmt.Fprintln(w, "astray:", s)
	}
	for _, name := range h.unknown {
		fmt.Fprintf(w, "%s: on no floor; give it one in scripts/floors/main.go\n", name)
	}
	for _, name := range h.absent {
		fmt.Fprintf(w, "%s: has a floor in scripts/floors/main.go, and is not there\n", name)
	}
	for _, name := range h.twice {
		fmt.Fprintf(w, "%s: has two floors in scripts/floors/main.go\n", name)
	}
	if len(up)+len(h.strays) > 0 {
		fmt.Fprintf(w, "arrows up: %d, methods astray: %d\n", len(up), len(h.strays))
	}
	return len(up)+len(h.strays)+len(h.unknown)+len(h.absent)+len(h.twice) > 0
}

// up are the arrows that run back up. A file that is on no floor is told of as such.
func (h *house) up() []*arrow {
	return slices.DeleteFunc(slices.Clone(h.arrows), func(a *arrow) bool {
		return h.floor[a.from] >= h.floor[a.to] || slices.Contains(h.unknown, a.from) || slices.Contains(h.unknown, a.to)
	})
}

func (a *arrow) String() string {
	var uses []string
	for _, u := range a.uses {
		uses = append(uses, fmt.Sprintf("%s (%s:%d)", u.name, filepath.Base(u.at.Filename), u.at.Line))
	}
	return fmt.Sprintf("%s -> %s: %s", a.from, a.to, strings.Join(uses, ", "))
}
