package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
)

// edit is a change that a planted bug makes.
type edit struct{ file, old, new string }

// readPlanted reads the changes out of the table of planted bugs: the calls of change, and the
// literals of edit, which both end in a file, the text there and the text in its place.
func readPlanted(path string) (edits []edit, err error) {
	tree, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	take := func(of []ast.Expr) {
		if len(of) < 3 {
			return
		}
		e := edit{}
		for i, to := range []*string{&e.file, &e.old, &e.new} {
			text, ok := textOf(of[len(of)-3+i])
			if !ok {
				return
			}
			*to = text
		}
		if strings.HasSuffix(e.file, ".go") {
			edits = append(edits, e)
		}
	}
	ast.Inspect(tree, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			take(n.Args)
		case *ast.CompositeLit:
			take(n.Elts)
		}
		return true
	})
	if len(edits) == 0 {
		return nil, fmt.Errorf("%s: no planted bugs found", path)
	}
	return edits, nil
}

// textOf is the value of a text, which may be put together of several.
func textOf(e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, err == nil && e.Kind == token.STRING
	case *ast.BinaryExpr:
		x, ok := textOf(e.X)
		y, too := textOf(e.Y)
		return x + y, ok && too && e.Op == token.ADD
	}
	return "", false
}

// like says whether the slip changes the same piece of the same lines, or comes to the same.
func (e edit) like(s *slip) bool {
	if e.file != s.file.name || !strings.Contains(s.file.text, e.old) {
		return false
	}
	text := s.file.text
	start := strings.Index(text, e.old)
	end := start + len(e.old)
	was, is := e.old, e.new
	for was != "" && is != "" && was[0] == is[0] {
		was, is = was[1:], is[1:]
		start++
	}
	for was != "" && is != "" && was[len(was)-1] == is[len(is)-1] {
		was, is = was[:len(was)-1], is[:len(is)-1]
		end--
	}
	if s.start <= end && start <= s.end && s.file.lineOf(start) == s.file.lineOf(s.start) && s.file.lineOf(end) == s.file.lineOf(s.end) {
		return true
	}
	const near = 200 // what comes to the same may begin elsewhere, but not far
	if s.start > end+near || start > s.end+near {
		return false
	}
	return dense(strings.Replace(text, e.old, e.new, 1)) == dense(s.changed())
}

// dense leaves out the white space.
func dense(text string) string { return strings.Join(strings.Fields(text), "") }
