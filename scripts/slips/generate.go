package main

import (
	"go/ast"
	"go/constant"
	"go/token"
	"go/types"
	"strconv"
	"strings"
)

// kind is what goes wrong in a slip.
type kind string

const (
	negate     kind = "negated condition"
	operand    kind = "lost operand"
	operator   kind = "wrong operator"
	bound      kind = "wrong comparison"
	arguments  kind = "swapped arguments"
	statement  kind = "lost statement"
	deferred   kind = "lost defer or go"
	number     kind = "wrong number"
	truth      kind = "wrong truth value"
	offByOne   kind = "off by one"
	swallowed  kind = "swallowed error"
	branch     kind = "lost case or else"
	element    kind = "lost element"
	field      kind = "wrong field"
	jump       kind = "lost jump"
	assignment kind = "lost assignment"
)

// generator walks a file and collects the slips that can be made of it.
type generator struct {
	*source
	info  *types.Info
	path  []ast.Node // from the file to the node at hand
	slips []*slip
}

// slips are all that can be made of the file, those that do not compile too.
func (s *source) slips() []*slip {
	g := &generator{source: s, info: s.pkg.info}
	ast.Inspect(s.tree, func(n ast.Node) bool {
		if n == nil {
			g.path = g.path[:len(g.path)-1]
			return true
		}
		g.visit(n)
		g.path = append(g.path, n)
		return true
	})
	seen := make(map[string]int)
	for _, sl := range g.slips {
		seen[sl.String()]++
		sl.nth = seen[sl.String()]
	}
	return g.slips
}

// replace adds the slip that has other text from one position to another.
func (g *generator) replace(k kind, from, to token.Pos, text string) {
	start, end := g.offset(from), g.offset(to)
	if g.text[start:end] == text {
		return
	}
	g.slips = append(g.slips, &slip{
		file: g.source, kind: k, function: g.function(),
		start: start, end: end, text: text, line: g.lineOf(start),
	})
}

func (g *generator) put(k kind, n ast.Node, text string) { g.replace(k, n.Pos(), n.End(), text) }

func (g *generator) of(n ast.Node) string { return g.text[g.offset(n.Pos()):g.offset(n.End())] }

// function names the declaration at hand.
func (g *generator) function() string {
	for _, n := range g.path {
		d, ok := n.(*ast.FuncDecl)
		if !ok {
			continue
		}
		if d.Recv == nil {
			return d.Name.Name
		}
		of := g.of(d.Recv.List[0].Type)
		of, _, _ = strings.Cut(strings.TrimPrefix(of, "*"), "[")
		return of + "." + d.Name.Name
	}
	return "package"
}

// signature is that of the innermost function.
func (g *generator) signature() *types.Signature {
	for i := len(g.path) - 1; i >= 0; i-- {
		switch n := g.path[i].(type) {
		case *ast.FuncLit:
			return g.info.TypeOf(n).(*types.Signature)
		case *ast.FuncDecl:
			return g.info.Defs[n.Name].Type().(*types.Signature)
		}
	}
	return nil
}

// inBlock says whether the node at hand is a statement of a list, not a part of another statement.
func (g *generator) inBlock() bool {
	if len(g.path) == 0 {
		return false
	}
	switch g.path[len(g.path)-1].(type) {
	case *ast.BlockStmt, *ast.CaseClause, *ast.CommClause:
		return true
	}
	return false
}

func (g *generator) visit(n ast.Node) {
	switch n := n.(type) {
	case *ast.IfStmt:
		g.put(negate, n.Cond, "!("+g.of(n.Cond)+")")
		if n.Else != nil {
			g.replace(branch, n.Body.End(), n.Else.End(), "")
		}
	case *ast.ForStmt:
		if n.Cond != nil {
			g.put(negate, n.Cond, "!("+g.of(n.Cond)+")")
		}
	case *ast.RangeStmt:
		if g.isNumber(n.X) {
			g.put(offByOne, n.X, g.of(n.X)+" + 1")
			g.put(offByOne, n.X, g.of(n.X)+" - 1")
		}
	case *ast.BinaryExpr:
		g.binary(n)
	case *ast.CallExpr:
		g.call(n)
	case *ast.ExprStmt, *ast.SendStmt:
		if g.inBlock() {
			g.put(statement, n, "")
		}
	case *ast.IncDecStmt:
		if g.inBlock() {
			g.put(assignment, n, "")
		}
		other := map[token.Token]string{token.INC: "--", token.DEC: "++"}[n.Tok]
		g.put(operator, n, g.of(n.X)+other)
	case *ast.AssignStmt:
		g.assign(n)
	case *ast.DeferStmt:
		g.replace(deferred, n.Pos(), n.Call.Pos(), "")
		g.put(statement, n, "")
	case *ast.GoStmt:
		g.replace(deferred, n.Pos(), n.Call.Pos(), "")
	case *ast.BasicLit:
		g.literal(n)
	case *ast.Ident:
		if o := g.info.Uses[n]; o != nil && o.Parent() == types.Universe && (n.Name == "true" || n.Name == "false") {
			g.put(truth, n, strconv.FormatBool(n.Name == "false"))
		}
	case *ast.ReturnStmt:
		g.returns(n)
	case *ast.BlockStmt:
		g.cases(n)
	case *ast.CompositeLit:
		g.elements(n)
	case *ast.SelectorExpr:
		g.selector(n)
	case *ast.BranchStmt:
		if n.Tok != token.GOTO {
			g.put(jump, n, "")
		}
	case *ast.IndexExpr:
		if t := g.info.TypeOf(n.X); t != nil && g.isNumber(n.Index) && !isMap(t) {
			g.put(offByOne, n.Index, g.of(n.Index)+"+1")
			g.put(offByOne, n.Index, g.of(n.Index)+"-1")
		}
	case *ast.SliceExpr:
		for _, at := range []ast.Expr{n.Low, n.High} {
			if at != nil {
				g.put(offByOne, at, g.of(at)+"+1")
				g.put(offByOne, at, g.of(at)+"-1")
			}
		}
	}
}

func isMap(t types.Type) bool {
	_, ok := t.Underlying().(*types.Map)
	return ok
}

// isNumber says whether the expression is a value with a number's type.
func (g *generator) isNumber(e ast.Expr) bool {
	tv := g.info.Types[e]
	if !tv.IsValue() {
		return false
	}
	b, ok := tv.Type.Underlying().(*types.Basic)
	return ok && b.Info()&types.IsNumeric != 0
}

var (
	bounds = map[token.Token]string{token.LSS: "<=", token.LEQ: "<", token.GTR: ">=", token.GEQ: ">"}
	signs  = map[token.Token]string{token.ADD: "-", token.SUB: "+", token.MUL: "/", token.QUO: "*", token.SHL: ">>", token.SHR: "<<"}
	logic  = map[token.Token]string{token.LAND: "||", token.LOR: "&&", token.EQL: "!=", token.NEQ: "=="}
)

func (g *generator) binary(n *ast.BinaryExpr) {
	other := func(k kind, text string) {
		if text != "" {
			g.put(k, n, g.of(n.X)+" "+text+" "+g.of(n.Y))
		}
	}
	other(bound, bounds[n.Op])
	other(operator, logic[n.Op])
	if g.isNumber(n) {
		other(operator, signs[n.Op])
	}
	if n.Op == token.LAND || n.Op == token.LOR {
		g.put(operand, n, g.of(n.X))
		g.put(operand, n, g.of(n.Y))
	}
}

func (g *generator) call(n *ast.CallExpr) {
	if name, ok := n.Fun.(*ast.Ident); ok && (name.Name == "min" || name.Name == "max") {
		g.put(operator, name, map[string]string{"min": "max", "max": "min"}[name.Name])
		return // its arguments may stand in any order
	}
	for i, a := range n.Args {
		for _, b := range n.Args[i+1:] {
			s, t := g.info.TypeOf(a), g.info.TypeOf(b)
			if s == nil || t == nil || !types.Identical(s, t) || g.of(a) == g.of(b) {
				continue
			}
			between := g.text[g.offset(a.End()):g.offset(b.Pos())]
			g.replace(arguments, a.Pos(), b.End(), g.of(b)+between+g.of(a))
		}
	}
}

func (g *generator) assign(n *ast.AssignStmt) {
	if n.Tok == token.DEFINE {
		return
	}
	if g.inBlock() {
		g.put(assignment, n, "")
	}
	other := map[token.Token]string{token.ADD_ASSIGN: "-=", token.SUB_ASSIGN: "+=", token.MUL_ASSIGN: "/=", token.QUO_ASSIGN: "*="}[n.Tok]
	if other != "" && g.isNumber(n.Lhs[0]) {
		g.replace(operator, n.TokPos, n.TokPos+token.Pos(len(n.Tok.String())), other)
	}
}

func (g *generator) literal(n *ast.BasicLit) {
	v := constant.MakeFromLiteral(n.Value, n.Kind, 0)
	switch n.Kind {
	case token.INT:
		i, exact := constant.Int64Val(v)
		if !exact || i > 1<<40 {
			return
		}
		if i == 0 {
			g.put(number, n, "1")
			return
		}
		g.put(number, n, "0")
		g.put(number, n, strconv.FormatInt(2*i, 10))
		if i > 1 {
			g.put(number, n, strconv.FormatInt(i/2, 10))
			g.put(offByOne, n, strconv.FormatInt(i-1, 10))
			g.put(offByOne, n, strconv.FormatInt(i+1, 10))
		}
	case token.FLOAT:
		if f, _ := constant.Float64Val(v); f != 0 {
			for _, other := range []float64{0, f / 2, 2 * f} {
				g.put(number, n, strconv.FormatFloat(other, 'g', -1, 64))
			}
		}
	}
}

func (g *generator) returns(n *ast.ReturnStmt) {
	if len(n.Results) == 0 {
		g.put(jump, n, "")
		return
	}
	sig := g.signature()
	if sig == nil || sig.Results().Len() != len(n.Results) {
		return
	}
	for i, r := range n.Results {
		if types.Identical(sig.Results().At(i).Type(), types.Universe.Lookup("error").Type()) {
			g.put(swallowed, r, "nil")
		}
	}
}

// cases loses a case of a switch or of a select.
func (g *generator) cases(n *ast.BlockStmt) {
	if len(n.List) < 2 {
		return
	}
	for _, s := range n.List {
		switch c := s.(type) {
		case *ast.CaseClause:
			g.put(branch, c, "")
			if len(c.List) > 1 {
				for _, e := range c.List {
					g.lose(branch, e)
				}
			}
		case *ast.CommClause:
			g.put(branch, c, "")
		}
	}
}

func (g *generator) elements(n *ast.CompositeLit) {
	for _, e := range n.Elts {
		g.lose(element, e)
	}
}

// lose takes an element out of a list, with the comma behind it, or else the one before it.
func (g *generator) lose(k kind, n ast.Node) {
	from, to := n.Pos(), n.End()
	behind := g.text[g.offset(to):]
	if rest := strings.TrimLeft(behind, " \t"); strings.HasPrefix(rest, ",") {
		to += token.Pos(len(behind) - len(rest) + 1)
	} else if before := g.text[:g.offset(from)]; strings.HasSuffix(strings.TrimRight(before, " \t"), ",") {
		from -= token.Pos(len(before) - len(strings.TrimRight(before, " \t")) + 1)
	}
	g.replace(k, from, to, "")
}

// selector takes the next field with the same type.
func (g *generator) selector(n *ast.SelectorExpr) {
	s := g.info.Selections[n]
	if s == nil || s.Kind() != types.FieldVal || len(s.Index()) != 1 {
		return
	}
	t := s.Recv()
	if p, ok := t.Underlying().(*types.Pointer); ok {
		t = p.Elem()
	}
	of, ok := t.Underlying().(*types.Struct)
	if !ok {
		return
	}
	at := s.Index()[0]
	for i := 1; i < of.NumFields(); i++ {
		f := of.Field((at + i) % of.NumFields())
		if types.Identical(f.Type(), s.Type()) && f.Name() != "_" && (f.Exported() || f.Pkg() == g.pkg.types) {
			g.put(field, n.Sel, f.Name())
			return
		}
	}
}
